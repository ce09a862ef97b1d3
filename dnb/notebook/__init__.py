"""The only folder that knows IPython, ipywidgets and plotly."""
