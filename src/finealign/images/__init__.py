"""Images: listing, decoding, the pixel cache, prefetching and views."""
