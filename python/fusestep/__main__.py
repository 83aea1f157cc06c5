"""``python -m fusestep`` prints what this build has and uses."""

from .runtime import show_config

if __name__ == "__main__":
    show_config()
