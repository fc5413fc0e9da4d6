# Serves one static page a run, written anew every $VIEWER_EVERY seconds. Only the pages are served, not the runs.
reports=${VIEWER_REPORTS:-/srv/retool/reports}
pages() {
    for run in runs/*/ runs/*/*/; do
        [ -f "$run/learner.jsonl" ] || continue
        name=$(printf %s "${run#runs/}" | tr / - | sed 's/-*$//')
        retool view "$run" --export "$reports/$name.html" >/dev/null || echo "no page of $run yet" >&2
    done
}
cd /srv/retool || exit 1
(while :; do pages; sleep "${VIEWER_EVERY:-30}"; done) &
exec python3 -m http.server --directory "$reports" 8000
