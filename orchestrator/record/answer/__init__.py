"""Records -> the answer: tables, pictures, pages."""
