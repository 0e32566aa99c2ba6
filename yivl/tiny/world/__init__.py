"""A small world of pictures: scenes, their pixels, and what is said of them in English and Chinese."""
