"""`python -m server`."""

import sys

__all__: list[str] = []

if __name__ == "__main__":
    try:
        from server.cli import main
    except KeyboardInterrupt:  # Ctrl-C while the libraries are imported: nothing has begun
        sys.exit(130)
    main()
