"""The search for preference objectives: a language of them, a race that judges them, and an honest verdict."""
