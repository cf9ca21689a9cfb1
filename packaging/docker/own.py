"""Gives a directory with its files to the agent's user, with nothing but the capability CHOWN.

    python -I -S own.py DIRECTORY UID

Status 0: it is that user's; 1: it can't be given away.
"""

import os
import sys

_MODE = 0o750


def main() -> int:
    """Changes owners and mode; the exit status."""
    directory, user = sys.argv[1], int(sys.argv[2])
    try:
        os.chown(directory, 0, 0)  # without FOWNER and DAC_OVERRIDE root has no say over what is another's
        os.chmod(directory, _MODE)
        for name in os.listdir(directory):
            os.chown(os.path.join(directory, name), user, user, follow_symlinks=False)
        os.chown(directory, user, user)
    except OSError as error:
        print(f"{directory}: {error.strerror}: expected a directory that can be given to user {user}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
