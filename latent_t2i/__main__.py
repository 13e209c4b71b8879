"""`python -m latent_t2i` is the console command `latent-t2i`."""

import sys

from latent_t2i.cli import main

if __name__ == "__main__":
    sys.exit(main())
