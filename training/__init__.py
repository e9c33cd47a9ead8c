"""What train.py needs beside its loop: settings, setup, the run's folder."""
