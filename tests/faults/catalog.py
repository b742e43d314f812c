"""Every fault of the suite: where it strikes, what it is, how it is put in. The page docs/reliability.md has a row for each.

A test of this folder names its fault and tells what it saw (conftest.py, `told`); `shown_by` names tests elsewhere instead, of
which none may fail (recorder.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    where: str
    what: str
    how: str
    shown_by: tuple[str, ...] = ()  # tests outside of this folder
    sees: str = ""  # what the user sees, where the test does not tell it
    again: str = ""  # and what is done again


SPANS, GROUPS = "tests/cluster/test_span_workers.py", "tests/cluster/test_rank_groups.py"
STORE, PLACING = "tests/cluster/test_store_s3.py", "tests/cluster/test_placing.py"
INJECTED = "in the worker, at the call of the product's own function"
FAULTS: dict[str, Known] = {
    # -- worker --------------------------------------------------------------------------------------------------------
    **{
        f"kill-{key}": Known("worker", f"SIGKILL {text}", INJECTED)
        for key, text in {
            "open": "while it opens the models",
            "load": "while it reads a layer's weights",
            "layer": "in a middle layer",
            "lens": "in the lens",
            "commit": "while it commits a span",
            "write": "while it writes the tables",
            "rename": "between two files that it puts in place",
            "before-marker": "before the marker",
            "after-marker": "after the marker",
        }.items()
    },
    "stop": Known("worker", "SIGSTOP for two seconds", "in a middle layer; SIGCONT from a process beside it"),
    "stop-minute": Known("worker", "SIGSTOP for a minute", "in a middle layer of a sweep; SIGCONT from a process beside it"),
    "stop-forever": Known(
        "worker", "SIGSTOP for good", "in a sweep's worker; the half an hour is three seconds in the test",
        ("tests/cluster/test_silence.py::test_a_worker_that_is_stopped_for_good_is_ended_and_replaced",),
        "after half an hour `no sign of life from the worker on <node> …: its process is stopped or hangs; it is ended`; trying again",
        "from the last span on",
    ),
    "oom-layer": Known("worker", "device out of memory in a layer", "torch.OutOfMemoryError, raised in the layer"),
    "oom-lens": Known("worker", "device out of memory in the lens", "torch.OutOfMemoryError, raised in the lens"),
    "oom-host": Known("worker", "host out of memory", "MemoryError, raised while a layer is read"),
    "cuda-poison": Known(
        "worker", "CUDA error that poisons the process", "torch.AcceleratorError in a layer, and at every later call"
    ),
    "cuda-poison-sweep": Known("worker", "the same in a sweep", "torch.AcceleratorError in a layer of a Ray worker"),
    "nan-weight": Known("worker", "NaN in a weight", "one number of a layer's weights, after it was read"),
    "inf-state": Known("worker", "Inf in a hidden state", "one number of what a layer made"),
    "prefetch": Known("worker", "exception in the thread that reads ahead", "RuntimeError, raised in the thread"),
    # -- Ray -----------------------------------------------------------------------------------------------------------
    "sweep-worker-killed": Known("Ray", "a sweep's worker killed in a layer", INJECTED),
    "driver-killed": Known("Ray", "driver killed, and run again", "SIGKILL once a span is committed"),
    "raylet-killed": Known("Ray", "raylet of a sweep's only node killed", "SIGKILL once a span is committed"),
    "head-killed": Known("Ray", "head (GCS) killed, and run again on a new one", "SIGKILL once a span is committed"),
    "job-stop": Known("Ray", "`ray job stop`", "SIGTERM to the driver, SIGKILL three seconds later, as Ray's job agent does"),
    "node-lost": Known(
        "Ray", "node lost, and with it the objects that it held", "its raylet is killed before anything was copied",
        (f"{SPANS}::test_what_was_lost_with_its_node_is_made_again",),
        "`LostError` or `WorkerDiedError`; trying again, layers first that were lost with their node", "the layers that were lost, and those behind them",
    ),
    "span-worker-killed": Known(
        "Ray", "worker of one of three spans killed", "SIGKILL behind its first layer, on two nodes",
        (f"{SPANS}::test_three_spans_on_two_nodes_with_a_worker_killed_give_the_tables_of_one_worker",),
        "`lost the worker on <node>`; trying again: only its own layers", "its own layers",
    ),
    "rank-killed": Known(
        "Ray", "one rank of a tensor-parallel group killed", "SIGKILL once a span is committed",
        (f"{GROUPS}::test_a_rank_that_dies_takes_its_group_down_and_the_next_group_goes_on_after_the_last_span",),
        "`lost the worker on <node>`; trying again; no placement group is left", "from the last span on",
    ),
    "line-cut": Known(
        "Ray", "line between driver and worker cut while the work's answer comes", "three times Ray says that the worker cannot be reached",
        ("tests/cluster/test_cut_line.py::test_an_answer_that_was_cut_off_is_asked_for_again",),
        "nothing: the work goes on, and its end is asked for when the line is back", "nothing",
    ),
    "never-placed": Known(
        "Ray", "placement never ready", "entries that wait for a place, on a clock of the test's own",
        (f"{PLACING}::test_an_entry_is_given_up_when_its_time_is_over", f"{PLACING}::test_what_is_waited_for_is_told_once"),
        "`waiting for a place with 1 GPU`; after --place-within: `got no place within …; there is …`", "nothing",
    ),
    # -- storage -------------------------------------------------------------------------------------------------------
    "disk-full": Known("storage", "disk full while writing", "a file system of 256 KiB"),
    "disk-full-again": Known("storage", "disk full at the tables' first bytes", "ENOSPC from the Parquet writer"),
    "read-only": Known("storage", "disk turns read-only", "EROFS from every rename, from the middle of a walk on"),
    "rename-fails": Known("storage", "rename fails", "EIO when a table is put in place"),
    "fsync-fails": Known("storage", "fsync fails", "EIO when a table is made durable"),
    "slow-disk": Known("storage", "slow disk", "half a second at every table and rename"),
    "two-writers": Known("storage", "two sweeps on one output at once", "two processes, one capture"),
    "clock-back": Known("storage", "clock set back by a day between two attempts", "the wall clock of one process"),
    "table-truncated": Known("storage", "truncated Parquet file found on resume", "the file is cut in the middle"),
    "table-flipped": Known("storage", "bit-flipped Parquet file found on resume", "one bit in the middle of the file"),
    "span-truncated": Known("storage", "truncated span found on resume", "the file is cut in the middle"),
    "span-flipped": Known("storage", "bit-flipped span found on resume", "one bit in the middle of the file"),
    "forced-over": Known("storage", "--force killed while it replaces a complete capture", INJECTED),
    "store-5xx": Known(
        "storage", "object store says busy (5xx, 429 with SlowDown), is silent, or breaks the line", "a local store that errs on order",
        (f"{STORE}::test_a_store_that_says_busy_or_breaks_the_line_is_asked_again",),
        "nothing: the store is asked again", "what was refused",
    ),
    "store-down": Known(
        "storage", "object store stays broken", "a local store that errs on order",
        (f"{STORE}::test_a_store_that_stays_broken_is_one_error_and_leaves_no_marker",),
        "one `StoreError`; no marker is there", "the delivery",
    ),
    "store-end": Known(
        "storage", "object store fails a capture at its end", "a local store that errs on order",
        (f"{STORE}::test_a_capture_whose_store_fails_it_at_the_end_goes_on_where_it_was",),
        "`StoreError: cannot write …`; run again, it goes on behind the last span", "from the last span on",
    ),
    "store-partial": Known(
        "storage", "partial upload", "an upload of several parts that is cut",
        (f"{STORE}::test_what_is_larger_than_a_part_is_there_whole_or_not_at_all",),
        "nothing of the object is there", "the upload",
    ),
    "store-silent": Known(
        "storage", "object store does not say what it has", "a local store that errs on order",
        (f"{STORE}::test_a_capture_whose_store_fails_it_at_the_end_goes_on_where_it_was",),
        "`StoreError: cannot read …`; nothing is made again", "nothing",
    ),
    "interleaved": Known("storage", "any interleaving of two writers, crashes and reruns", "drawn by hypothesis, at every system call of the store"),
    # -- models --------------------------------------------------------------------------------------------------------
    **{
        f"hub-{key}": Known("models", f"hub says {text}", "a local hub that errs on order, asked by the real client")
        for key, text in {
            "401": "401: no login", "403": "403: gated", "404": "404: no such model", "429": "429: too many requests",
            "5xx": "500, 502, 503 for good",
        }.items()
    },
    "hub-gone": Known("models", "hub cannot be reached, and the cache has the model", "nobody listens at its address"),
    "hub-disk": Known("models", "disk too small for a model", "a disk that says so"),
    "download-cut": Known("models", "download cut for good, and begun again", "a local hub that closes the line in the middle"),
    "download-flaps": Known("models", "download cut now and then", "a local hub that closes the line three times"),
    "shard-truncated": Known("models", "shard in the cache truncated", "the file is cut"),
    "shard-wrong": Known("models", "shard downloaded with other bytes", "a local hub that sends as many other bytes"),
    "shard-wrong-stream": Known(
        "models", "shard with other bytes that is read straight from the hub", "one bit of what came",
        ("tests/capture/test_remote.py::test_wrong_bytes_end_the_capture_and_leave_nothing",),
        "`CheckpointError: …: the bytes that came are not those of the hub …`; nothing of the capture or the file is kept", "the capture",
    ),
    "shard-changed": Known("models", "local shard changed between two runs", "one bit in the file"),
    "tokenizer-other": Known("models", "base and sft with tokenizers that differ", "two tokens of the base's own changed places"),
    "tokenizer-larger": Known("models", "tokenizer larger than the models' embeddings", "a prompt with a token that no row is for"),
    # -- network -------------------------------------------------------------------------------------------------------
    "flapping": Known(
        "network", "the line to the head's disk flaps", "a third of all calls or answers are lost, twenty seeds",
        ("tests/cluster/test_deliver.py::test_a_line_that_is_cut_again_and_again_delivers_what_was_sent",),
        "nothing: what was not heard of is sent again", "what was not heard of",
    ),
    "one-way-out": Known("network", "one-way loss: nothing leaves a node", "packets dropped by a firewall, on hosts of their own"),
    "one-way-in": Known("network", "one-way loss: nothing reaches a node", "packets dropped by a firewall, on hosts of their own"),
    "tunnel-flaps": Known("network", "a node's tunnel flaps", "its ssh is killed six times within seconds"),
    "key-refused": Known("network", "ssh key refused", "the key is taken out of the head's authorized_keys"),
    "probed": Known("network", "a host's ports tried from outside", "connections from another network, with the firewall of a rented machine"),
    # -- Vast ----------------------------------------------------------------------------------------------------------
    "vast": Known(
        "Vast", "all of the provider's faults, randomly mixed: 28 kinds, and machines that vanish, are outbid, reboot",
        "200 seeded lives of a cluster against the fake market, in virtual time", ("tests/cluster/test_vast_chaos.py::test_any_mixture_of_faults_leaves_no_machine_and_rents_none_twice",),
        "no orphan, no machine rented twice, the bill what was needed and what the faults took",
    ),
    # -- people --------------------------------------------------------------------------------------------------------
    "ctrl-c": Known("people", "Ctrl-C twice", "SIGINT twice to a capture that hears nothing of the first"),
    "ctrl-c-sweep": Known(
        "people", "the same in a sweep", "SIGINT twice to a sweep whose worker hears nothing",
        ("tests/cluster/test_stop.py::test_a_second_ctrl_c_stops_at_once",),
        "exit code 130 at once; `status` says `interrupted`; no worker is left", "from the last spans on",
    ),
    "terminal-closed": Known("people", "terminal closed", "SIGHUP, and a terminal that takes no more lines"),
    "asleep": Known("people", "laptop asleep in a capture", "SIGSTOP and SIGCONT to all its processes, three times"),
    "asleep-collect": Known("people", "laptop asleep while it collects", "the same, while the sweep goes on and ends"),
    "asleep-driver": Known("people", "driver of a sweep asleep for a minute", "SIGSTOP and SIGCONT to it alone, once a span is committed"),
    "asleep-sweep": Known("people", "laptop asleep in a sweep for a minute", "the same to the driver, its Ray and its workers"),
    "wrong-directory": Known("people", "wrong directory given to a reader", "somebody's photos, a file, no such place"),
    "config-edited": Known("people", "config edited between two runs of one output", "one more prompt"),
}  # fmt: skip
