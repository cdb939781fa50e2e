import sys

from bingo_edge.cli import main

sys.exit(main())
