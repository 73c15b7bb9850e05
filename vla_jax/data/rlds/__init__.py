"""RLDS datasets: TFRecord shards, byte index, tf.data stream, writer."""
