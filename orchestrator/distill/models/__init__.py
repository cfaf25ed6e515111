"""Models: families of teachers, surgery on them, students as artefacts, and as folders for Hugging Face."""
