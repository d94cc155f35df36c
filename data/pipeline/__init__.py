"""The stages of data.prepare as datatrove pipeline steps, and their executors. Stages communicate only through files:
one atomically written folder for each item of work."""
