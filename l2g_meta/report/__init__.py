"""A page to look at: ``l2g report RUN [RUN ...]`` draws what trained runs did into one HTML file.

``reported_run`` reads folders, ``measure`` and ``experiments`` test what is trained; ``confusion`` and ``projection``
are numbers; ``svg``, ``charts`` and ``thumbnails`` pictures of them; ``page``, ``image_section`` and the templates are
the text.
"""
