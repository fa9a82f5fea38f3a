def render_html(report): return "x"
