"""The shell of the pages that preview and report write: one file, no network, light and dark.

A room has a template of its own beside its modules, which extends the shell's, and hands over values and figures:

    {# vlm_dist/report/report.html.jinja #}
    {% extends "page.html.jinja" %}
    {% block main %}
    <section id="curves"><h2>Curves</h2>
      {{ chart(loss, "Loss by step", caption="Each point is a mean over 10 steps.") }}
    </section>
    {% endblock %}

    page = Page("Training report", "outputs/demo", templates=Path(__file__).parent, template="report.html.jinja",
                facts=[("steps", "1,200"), ("loss", "0.31")], nav=[("curves", "Curves")])
    page.write(Path("report.html"), loss=figure)

What the shell knows:

* `facts` are shown in a row under the title, `nav` (id of a section, its name) as contents beside the page.
* `chart(figure, label, caption="", height=300)` puts a plotly figure there, which is drawn in the reader's theme.
  Colours that are to change with it are those of `vlm_dist.observability.page.palette` (`SERIES`, `INK`, `MUTED`,
  `BAD` …); lines without a colour get `SERIES` in turn. Text from data (names of runs, sources) that goes into a figure
  is passed through `chart_text`.
* `data_uri(jpeg, "image/jpeg")` makes the `src` of a picture; there are no other addresses: the page forbids network.
* Everything in a template is escaped; nothing is to be marked safe. Inline scripts and handlers do not run: what the
  room's page does beyond the shell is a file beside the template, `Page(…, script="report.js")`.
* `data-item` on an element makes it a stop of the keys j, k and the arrows left and right. `{% block keys %}` adds rows
  to the list that `?` opens, `{% block style %}` adds CSS, `{% block aside %}` stands under the contents.
* Filters: `1200 | count` is 1,200, `0.25 | percent` is 25.0%.
* Classes: `card`, `columns` (cards side by side where there is room), `facts`, `tag` and `note` (with `good`, `warn` or
  `bad`), `scroll` (around a wide table), `num` (a column of figures), `muted`, `small`, `mono`, `thumbs` (pictures in a
  row: `figure`, `img`, `figcaption`).
"""

from vlm_dist.observability.page.charts import chart_text
from vlm_dist.observability.page.page import Page, check_place, data_uri

__all__ = ["Page", "chart_text", "check_place", "data_uri"]
