"""Metrics as modules that ``evaluate.load`` takes by their path, so that none needs a download.

``evaluate`` copies a module's file to where it imports it from: the files here import nothing of this package. They
take and return what the hub's modules of the same names do.
"""
