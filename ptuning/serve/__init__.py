"""One session (model and prefixes, loaded once) and its front ends: terminal, web page, API."""
