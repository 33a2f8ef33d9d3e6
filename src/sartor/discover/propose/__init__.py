"""Who invents: a random grammar, mutation and crossover, a language model; and who is asked next."""
