"""A web page and an HTTP API, served from this machine, that classify images with one fitted model."""
