"""The demo page: create, edit, ask and chat in a browser. It needs the extra `demo` (gradio)."""
