"""What every room uses: flags, files, ranks, streams of tokens."""
