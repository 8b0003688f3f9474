"""Hub repositories: their layout and code, saving, completing and pushing them, model cards."""
