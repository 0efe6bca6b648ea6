"""`python -m prefpipe` is `prefpipe`."""

from prefpipe.cli import main

if __name__ == "__main__":
    main()
