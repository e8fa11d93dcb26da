"""From a replica on disk to a repository on the Hub: its card, and the push."""
