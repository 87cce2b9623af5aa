"""What the operating system refuses, in one sentence with a remedy.

Left out: a remedy for every error there is. What has no file to it is a fault of ours, and stays one.
"""

from __future__ import annotations

import errno

REMEDIES = {
    errno.EACCES: "check your rights there, or choose another place",
    errno.EPERM: "check your rights there, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EISDIR: "a folder is where a file should be; move it away, or name another",
    errno.ENOTDIR: "a file is where a folder should be; move it away, or name another",
    errno.EEXIST: "a file is where a folder should be; move it away, or name another",
    errno.ENOENT: "look whether it is there",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.ENAMETOOLONG: "shorten it",
}


def refusal(error: OSError) -> str | None:
    """None where no file or folder was refused."""
    if error.filename is None or error.errno is None:
        return None
    remedy = REMEDIES.get(error.errno, "look at it")
    return f"{error.filename}: {error.strerror}; {remedy}"
