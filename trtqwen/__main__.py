"""`trtqwen` and `python -m trtqwen`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. Until the command's module is imported, Ctrl-C ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `trtqwen.cli` undoes this
    from trtqwen.cli import main as run

    run()


if __name__ == "__main__":
    main()
