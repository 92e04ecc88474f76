"""The guide's five stages, where overlay needs a text from the database."""
