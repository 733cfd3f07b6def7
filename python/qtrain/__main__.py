"""``python -m qtrain``, which launchers of several processes need."""

from .cli import main

if __name__ == "__main__":
    main()
