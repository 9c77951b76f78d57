"""Images for clusters: a Dockerfile, and what pip may install into it."""
