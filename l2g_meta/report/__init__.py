"""A page to look at: ``l2g report RUN [RUN ...]`` draws what trained runs did into one HTML file.

``reported_run`` reads folders, ``measure`` and ``experiments`` test what is trained; ``charts``, ``image_section``,
``projection`` and ``thumbnails`` prepare what is shown; ``page`` and the templates draw it and have the words.
"""
