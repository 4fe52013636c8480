"""`python -m trtqwen`."""

from trtqwen.cli import main

main()
