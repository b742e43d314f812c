"""The dependency audit, over what pip-audit says made up: nothing here asks a service."""

import importlib.machinery
import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit"


@pytest.fixture(scope="module")
def audit():
    loader = importlib.machinery.SourceFileLoader("audit_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("audit_script", loader))
    loader.exec_module(module)
    return module


def said(*rows):
    return json.dumps({"dependencies": list(rows), "fixes": []})


VULN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": ""}
CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "1", "vulns": [VULN]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found"}


def test_a_known_vulnerability_fails_unless_it_is_ignored_with_a_reason(audit):
    code, lines = audit.judge(said(CLEAN, BAD), "", {})
    assert code == 1
    assert any("b 1: PYSEC-1, CVE-1; fixed in 2.0" in line for line in lines)
    code, lines = audit.judge(said(CLEAN, BAD), "", {"CVE-1": "never called"})
    assert code == 0
    assert any("ignored: never called" in line for line in lines)


def test_a_service_that_is_not_there_is_said_and_is_no_failure(audit):
    for stdout, stderr in (
        ("", "ERROR:pip_audit._cli:ConnectionError: no route\nTip: your network may be blocking this service"),
        (said(UNKNOWN, UNKNOWN), ""),  # a mirror that has packages and no advisories
    ):
        code, lines = audit.judge(stdout, stderr, {})
        assert code == 0
        assert "NOTHING WAS CHECKED" in lines[0]


def test_a_program_that_fails_for_another_reason_fails(audit):
    assert audit.judge("", "No module named pip_audit", {})[0] == 1
    assert audit.judge("{}", "", {})[0] == 1


def test_clean_is_said_with_what_was_not_known(audit):
    code, lines = audit.judge(said(CLEAN, UNKNOWN), "", {})
    assert code == 0
    assert lines[0] == "audit: 1 packages checked"
    assert "c" in lines[1]


def test_a_reason_is_needed(audit):
    assert audit.ignored("# x\nCVE-1 because\n") == {"CVE-1": "because"}
    with pytest.raises(SystemExit, match="no reason"):
        audit.ignored("CVE-1\n")
