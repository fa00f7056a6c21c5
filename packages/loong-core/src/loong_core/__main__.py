"""`python -m loong_core` is `loong`."""

from loong_core.cli import main

if __name__ == "__main__":
    main()
