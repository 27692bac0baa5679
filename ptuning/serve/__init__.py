"""One session (model and prefixes, loaded once) and its thin faces: terminal, web page, API."""
