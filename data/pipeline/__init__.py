"""The stages of data.prepare as datatrove pipeline steps, and the executors that run them. Stages follow each other
through files alone: one folder for each unit of work, there whole or not at all."""
