"""Secrets planted into a rehearsal, and the look for them everywhere once it has ended.

planted = plant(stage)          # before `ray up`
with planted.watched() as seen:
    ...
    learn(stage, planted)       # while the cluster is up
    ...
check(stage, planted, seen, job=log.read_text())
"""

from __future__ import annotations

import json
from typing import Any

from rehearsal import Rehearsal
from secrets_search import Planted, modes

from cluster.vast import keys

# Files whose task is to hold a secret, on the laptop or on a host; whatever else holds one is a leak.
MAY_HOLD = {
    keys.SSH_KEY, keys.MESH_KEY, keys.TOKEN, keys.API_KEY, "key", "ray_bootstrap_key.pem", "token", "credentials"
}  # fmt: skip
PLANTED = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_API_KEY",
    "WANDB_API_KEY",
)


def plant(stage: Rehearsal, **changes: Any) -> Planted:
    """Write the stage's yaml with a login of the hub and keys of a store that go to the machines as the playbook says; all of
    PLANTED are in the laptop's environment. changes: of the yaml."""
    planted = Planted()
    planted.environment = {name: planted.environment[name] for name in PLANTED}
    stage.env |= planted.environment
    e = planted.environment
    store = f"[default]\naws_access_key_id = {e['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {e['AWS_SECRET_ACCESS_KEY']}\n"
    files = {"~/.cache/huggingface/token": e["HF_TOKEN"], "~/.aws/credentials": store}
    mounts = {}
    for there, content in files.items():
        here = stage.folder / there.replace("~", "home", 1)
        here.parent.mkdir(parents=True)
        keys.write_secret(here, content)
        mounts[there] = str(here)
    stage.write_yaml(file_mounts=mounts, **changes)
    return planted


def learn(stage: Rehearsal, planted: Planted) -> None:
    """Look for what the cluster made for itself, too: its keys, its token, the keys that Vast gave to it and to each machine."""
    planted.add("VAST_API_KEY", stage.env["VAST_API_KEY"])
    planted.add(keys.TOKEN, (stage.keys / keys.TOKEN).read_text().strip())
    for name in (keys.SSH_KEY, keys.MESH_KEY):
        planted.add(name, (stage.keys / name).read_text().splitlines()[-3])  # the line that holds the private part
    for row in stage.fake.control("keys"):
        planted.add(f"Vast key '{row['name']}'", row["key"])
    for line in stage.fake.bill():
        planted.add(f"key of {line['id']}", line["key"])


def check(stage: Rehearsal, planted: Planted, seen: list[str], **texts: str) -> None:
    """Nothing of it is in any file of the laptop or of a host, in what was said, in arguments of processes, in the rows of the
    market (labels, environments, start scripts) or in any request to it but for the header that is there for the key."""
    rows = [{k: v for k, v in line.items() if k != "key"} for line in stage.fake.bill()]
    texts |= {"rows": json.dumps(rows), "requests": json.dumps(stage.fake.control("requests"))}
    assert '"label"' in texts["requests"], "what was asked of the market is there to be searched"
    files = [p for p in stage.folder.rglob("*") if p.is_file()]
    kept = [p for p in files if p.name in MAY_HOLD]
    assert planted.found([stage.folder], texts, allowed=kept) == []
    assert seen == []
    assert modes(stage.folder, MAY_HOLD) == []
    # ... which says something only if secrets were there, and if the look would have found one
    held = {hit.split(" in ")[0] for p in kept for hit in planted.found([p.parent]) if hit.endswith(str(p))}
    assert {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", keys.TOKEN} <= held
    log = next(p for p in files if p.match("*/ray/session_*/logs/gcs_server.out"))
    with log.open("a") as stream:
        stream.write(planted.environment[keys.TOKEN])
    assert planted.found([log.parent]) == [f"{keys.TOKEN} in {log}"]
