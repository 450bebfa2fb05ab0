"""The list of findings: what it shows, and how messages are taken apart."""

import json
from pathlib import Path

from checking import of, rename
from sports import annotation, edit, write

from selfdetr.check.findings import Findings
from selfdetr.check.folder import check_folder
from selfdetr.data.files import DataError


def test_a_message_is_not_cut_inside_a_name(folder):
    edit(lambda d: d.update({"a; b": d.pop("a") | {"duration": "cut; short"}}))(folder)
    finding = of(check_folder(folder), "video entry")
    assert finding.problem == "duration is 'cut; short'" and finding.fix.startswith("write a finite number")
    write(folder, classes=["run", "jumq; x", "jump"])
    edit(lambda d: d["a"]["annotations"].append(annotation("jumq; y", 3, 4)))(folder)
    finding = of(check_folder(folder), "unknown label")
    assert finding.problem.endswith("the unknown label 'jumq; y'") and "did you mean 'jumq; x'?" in finding.fix


def test_groups_are_short_and_the_table_is_complete(folder):
    rename(folder, lambda path: path.with_name(f"v_{path.name}"))
    findings = check_folder(folder)
    assert str(findings).count("is not there") == 3 and "... and 2 more" in str(findings)
    assert findings.markdown().count("is not there") == 3 and "2 more: error, missing features" in findings.markdown()
    assert len(findings.table) == len(findings.found) >= 5
    assert list(findings.table.columns) == ["severity", "kind", "item", "problem", "fix"]
    assert json.loads(json.dumps(findings.to_dict()))["ok"] is False


def test_severities_come_in_order_and_pipes_do_not_break_tables():
    findings = Findings(Path("x"))
    for severity in ("note", "error", "warning"):
        findings.add(severity, "a|b", "what", severity=severity, fix="fix")
    assert findings.table.severity.tolist() == ["error", "warning", "note"]
    rows = [line for line in findings.markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_a_finding_about_the_whole_folder_has_its_name(tmp_path):
    (findings := Findings(tmp_path)).take("settings", str(tmp_path), DataError(f"{tmp_path}: has no rate; write one"))
    assert findings.found == [("error", "settings", tmp_path.name, "has no rate", "write one")]
