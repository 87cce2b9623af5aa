"""What the operating system refuses, in one sentence with a remedy.

Left out: a remedy for every error there is. What has no file to it is a fault of ours, and stays one.
"""

from __future__ import annotations

import errno

REMEDIES = {
    errno.EACCES: "check your rights there, or choose another place",
    errno.EPERM: "check your rights there, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room there and start again; nothing that was done is lost",
    errno.EDQUOT: "make room there and start again; nothing that was done is lost",
    errno.EISDIR: "a folder is where a file should be; move it away, or name another",
    errno.ENOTDIR: "a file is where a folder should be; move it away, or name another",
    errno.EEXIST: "a file is where a folder should be; move it away, or name another",
    errno.ENOENT: "look whether it is there",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.ENAMETOOLONG: "shorten it",
}


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Where it is the disk that refuses, writing tells no name."""


def refusal(error: OSError) -> str | None:
    """None where no file, folder or disk was refused."""
    if error.errno is None or (error.filename is None and error.errno not in FULL):
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {REMEDIES.get(error.errno, 'look at it')}"
