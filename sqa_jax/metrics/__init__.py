"""Reading answers out of replies, accuracy by the leaderboard's columns, intervals and tables. No JAX here."""
