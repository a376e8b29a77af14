-- Ends a claim with a record. ARGV: the claim done, its retention in ms, how to publish.
if not gone then
  if id_of(head) ~= id_of(ARGV[1]) or state == 'F' then return 0 end
  if state == 'D' then return 1 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
tell()
return 1
