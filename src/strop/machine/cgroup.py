"""Which control groups hold this process: its own and all above it, since every one of them limits."""

from pathlib import Path


def limits(controller: str, root: Path = Path("/")) -> list[Path]:
    """Directories to read `controller`'s limits from, innermost first; files are read below `root`.

    Covers cgroup v2 (one tree) and v1 (a tree per controller). A container often sees its own group as the top of the
    tree while /proc names the host's path, so the top always counts.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    trees = {root / "sys/fs/cgroup": "/", root / "sys/fs/cgroup" / controller: "/"}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            trees[root / "sys/fs/cgroup"] = path
        elif controller in controllers.split(","):
            trees[root / "sys/fs/cgroup" / controller] = path
    directories = []
    for tree, path in trees.items():
        inside = tree / path.strip("/")
        while inside != tree and tree in inside.parents:
            directories.append(inside)
            inside = inside.parent
        directories.append(tree)
    return [directory for directory in directories if ".." not in directory.parts and directory.is_dir()]
