"""`python -m conversion`."""

from .convert_omni_video import app

if __name__ == "__main__":
    app(prog_name="python -m conversion")
