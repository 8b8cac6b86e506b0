"""`python -m linearize.cli`, for launchers that start modules (torchrun -m)."""

from linearize.cli import main

if __name__ == "__main__":
    main()
