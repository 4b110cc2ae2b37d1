#!/usr/bin/env bash
# Runs every fuzz target of the module, or of the folders $3 and on, each for $1
# ("60s", or "3000x" inputs; FUZZBUILD=-race: without guidance, from the build of
# the tests), and keeps what it learns in $2. Ends at the first
# target that finds something; the input is then in testdata/fuzz beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
fuzztime=$1
mkdir -p "$2"
work=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- .
out=$work/last.txt

# An input that is under way when the time is over ends the run with this text
# alone (https://go.dev/issue/75804): it is the clock's, not the target's.
overtime() {
  grep -q '^ *context deadline exceeded$' "$out" && ! grep -q -e 'Failing input' -e '^panic' -e 'DATA RACE' "$out"
}

ran=0
for dir in $(git ls-files -- "$@" | grep '_test.go$' | xargs grep -l '^func Fuzz' | xargs -n 1 dirname | sort -u); do
  # One instrumented binary for each package; its targets run one after another.
  binary=$work/${dir//\//-}.test
  # shellcheck disable=SC2086
  go test -c ${FUZZBUILD:--fuzz .} -o "$binary" "./$dir"
  for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$dir"/*_test.go); do
    begin=$SECONDS
    if ! (cd "$dir" && "$binary" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$fuzztime" \
      -test.fuzzminimizetime 10x -test.fuzzcachedir "$work/cache/$dir") >"$out" 2>&1 && ! overtime; then
      cat "$out"
      exit 1
    fi
    echo "$dir $target: $(grep -o 'execs: [0-9]*' "$out" | tail -1), $((SECONDS - begin)) s"
    ran=$((ran + 1))
  done
done
echo "$ran fuzz targets, $fuzztime each: nothing found"
