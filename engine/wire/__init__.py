"""Every byte that crosses a process or a host; three borders, three layouts.

`packets` go over multifd channels (sender -> receiver), `main` over the main channel (source
control <-> destination control), `orders` between control and its workers. `messages` is what the
last two have in common; `stream` puts packets and messages on one descriptor.

Zero is invalid wherever a value names something: ids, numbers and counters start at 1, so cleared
or cut memory never passes for a message.
"""

from engine.wire.main import (
    Abort,
    Arm,
    Armed,
    ChannelBroken,
    DeviceState,
    Failed,
    Hello,
    Refused,
    Reopen,
    Reopened,
    RoundReceived,
    ToDestination,
    TookOver,
    ToSource,
    Welcome,
)
from engine.wire.messages import (
    BLOCKS_MAX,
    CHANNELS_MAX,
    DESCRIPTORS_MAX,
    FRAME,
    HELLO_BYTES_MAX,
    MAIN_BYTES_MAX,
    ORDER_BYTES_MAX,
    REASON_CHARACTERS_MAX,
    SENDER_FDS,
    SESSION_BYTES,
    STATE_BYTES_MAX,
    VERSION,
    BlockShape,
    Decoder,
    Message,
    check_blocks,
    cut,
    encode,
)
from engine.wire.orders import (
    RECEIVER_FDS,
    ChannelEnded,
    Compress,
    EndChannel,
    Harvest,
    Harvested,
    OpenChannel,
    Opened,
    PrepareReceiver,
    PrepareSender,
    Ready,
    ReceiverOrder,
    ReceiverReport,
    RoundSent,
    SenderOrder,
    SenderReport,
    SendRound,
    UseStream,
    WorkerFailed,
)
from engine.wire.packets import (
    BATCH_PAGES_MAX,
    HEADER,
    HEADER_BYTES_MAX,
    MAGIC,
    PACKET_FRAMES_MAX,
    PAYLOAD_BYTES_MAX,
    RUN,
    RUNS_MAX,
    ZERO_PAGES_MAX,
    CodecId,
    Packet,
    PacketKind,
    decode_packet,
)
from engine.wire.stream import (
    CHUNK,
    ChunkReader,
    StreamAnswer,
    StreamHello,
    StreamMessage,
    Take,
    chunk,
)

__all__ = [
    "BATCH_PAGES_MAX", "BLOCKS_MAX", "CHANNELS_MAX", "CHUNK", "DESCRIPTORS_MAX", "FRAME", "HEADER",
    "HEADER_BYTES_MAX", "HELLO_BYTES_MAX", "MAGIC", "MAIN_BYTES_MAX", "ORDER_BYTES_MAX",
    "PACKET_FRAMES_MAX", "PAYLOAD_BYTES_MAX", "REASON_CHARACTERS_MAX", "RECEIVER_FDS", "RUN",
    "RUNS_MAX", "SENDER_FDS", "SESSION_BYTES", "STATE_BYTES_MAX", "VERSION", "ZERO_PAGES_MAX",
    "Abort", "Arm", "Armed", "BlockShape", "ChannelBroken", "ChannelEnded", "ChunkReader",
    "CodecId", "Compress", "Decoder", "DeviceState", "EndChannel", "Failed", "Harvest",
    "Harvested", "Hello", "Message", "OpenChannel", "Opened", "Packet", "PacketKind",
    "PrepareReceiver", "PrepareSender", "Ready", "ReceiverOrder", "ReceiverReport", "Refused",
    "Reopen", "Reopened", "RoundReceived", "RoundSent", "SendRound", "SenderOrder", "SenderReport",
    "StreamAnswer", "StreamHello", "StreamMessage", "Take", "ToDestination", "ToSource",
    "TookOver", "UseStream", "Welcome", "WorkerFailed", "check_blocks", "chunk", "cut",
    "decode_packet", "encode",
]  # fmt: skip
