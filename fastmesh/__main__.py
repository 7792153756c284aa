"""`python -m fastmesh` is the command line."""

from fastmesh.cli import main

if __name__ == "__main__":
    main()
