"""A web page and an API that classify images with one fitted model, on this machine."""
