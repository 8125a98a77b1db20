"""A page that shows the concepts of a dictionary: see `explorer_page.concept_explorer`."""
