"""What the tests of selfdetr.check share: findings by their kind, and other names for files."""

SMALL = dict(window=64)


def kinds(findings):
    return set(findings.table.kind)


def of(findings, kind):
    "The only finding of a kind."
    (case,) = [finding for finding in findings.found if finding.kind == kind]
    return case


def rename(folder, change):
    for path in list((folder / "features").iterdir()):
        path.rename(change(path))
