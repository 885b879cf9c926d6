"""What a preparation made, on standard output."""

from a3_jax.data.prepared_manifest import HELDOUT, TRAIN, PreparedManifest

_NAMES_SHOWN = 10


def summary(manifest: PreparedManifest) -> list[str]:
    """Lines that say what a prepared directory holds."""
    counts, settings = manifest.counts, manifest.settings
    heldout = manifest.splits.get(HELDOUT, [])
    documents = f"{counts['documents']:,}"
    if heldout:
        documents += f", {counts['heldout_documents']:,} of them held out"
    if counts["cut"]:
        documents += f", {counts['cut']:,} cut at the end of their row"
    share = counts["padding"] / max(counts["rows"] * manifest.seq_len, 1)
    shards = f"{TRAIN} {len(manifest.splits[TRAIN])}" + (f", {HELDOUT} {len(heldout)}" if heldout else "")
    lines = [
        f"documents  {documents}",
        f"tokens     {counts['tokens']:,}, {_framing(settings)}",
        f"rows       {counts['rows']:,} of {manifest.seq_len} ({settings['packing']}), padding {share:.2%}",
        f"shards     {shards}, {sum(shard.bytes for shard in manifest.shards):,} bytes",
    ]
    for reason, count in counts["passed_over"].items():
        lines.append(f"passed over {count:,} {reason}, first {counts['first_passed_over'][reason]}")
    if ignored := counts.get("ignored_fields"):
        most = sorted(ignored, key=ignored.get, reverse=True)[:_NAMES_SHOWN]
        told = ", ".join(f"{name} (in {ignored[name]:,})" for name in most)
        more = f" and {len(ignored) - len(most)} more" if len(ignored) > len(most) else ""
        lines.append(f"ignored    fields that nothing reads: {told}{more}")
    return lines


def _framing(settings) -> str:
    """Returns what stands around each document."""
    names = [name for name, there in (("BOS", settings["adds_bos"]), ("EOS", settings["adds_eos"])) if there]
    return f"{' and '.join(names)} added to each document" if names else "neither BOS nor EOS added"
