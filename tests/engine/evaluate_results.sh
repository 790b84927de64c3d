#!/usr/bin/env bash
# evaluate_results.sh EVALUATE: `evaluate --results` draws what earlier runs wrote, and refuses what none did.
set -euo pipefail
evaluate=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

fail() {
    echo "evaluate_results.sh: $*" >&2
    exit 1
}

header=recipe,true_bits,read_bits,cache_bytes,tokens_per_second,kl_mean,kl_p99,kl_p999,same_top,perplexity
{
    echo "$header"
    echo fp16,16.04,0,100,1,0.0,0,0,1,20
    echo block32:8,8.51,0,50,1,.001,.01,.02,.98,20
    echo standard,4.5,0,30,1,.0016,.01,.02,.97,20
    echo key_favored:4:4,4.8,0,31,1,.0021,.01,.02,.97,20
    echo latent:2:2,2.8,0,20,1,.014,.1,.2,.93,20
} >one.csv
sed 's/standard,4.5/standard,4.6/' one.csv >two.csv

"$evaluate" --results one.csv,two.csv --plot plots >/dev/null
points=plots/models.csv
[ -f "$points" ] || fail "no $points"
# standard has fewer bits and diverges less than key_favored:4:4, which is not on the frontier then.
grep -q "one: kvplane's frontier,standard,4.5," "$points" || fail "standard is not on the frontier: $(cat "$points")"
grep -q "one: kvplane's frontier,latent:2:2,2.8," "$points" || fail "latent:2:2 is not on the frontier"
grep -q "one: other recipes,key_favored:4:4,4.8," "$points" || fail "key_favored:4:4 is on the frontier"
grep -q "two: kvplane's frontier,standard,4.6," "$points" || fail "the second model is missing"
grep -q fp16 "$points" && fail "fp16 presses the others together"

refused() {  # what the sentence must say, then the arguments
    local expected=$1 said
    shift
    if said=$("$evaluate" "$@" 2>&1); then fail "accepted: $*"; fi
    [[ $said == *"$expected"* ]] || fail "'$said' does not say '$expected'"
}
refused "takes --plot" --results one.csv
refused "absent.csv" --results absent.csv --plot plots
sed 's/kl_mean/digits_right/' one.csv >recall.csv
refused "no column kl_mean" --results recall.csv --plot plots
echo standard,4.5 >>two.csv
refused "2 fields, expected 10" --results two.csv --plot plots
