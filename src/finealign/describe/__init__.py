"""Descriptions of classes, asked of a chat endpoint, checked text by text, and recorded."""
